"""A double of the Hub's HTTP interface on the loopback device, for tests that publish and download.

The real `huggingface_hub` client speaks to it over real HTTP: repositories of models and data sets, git and
LFS uploads, pull requests, branches and tags, private and gated repositories, tokens with roles, and failures
on demand. Large files live on a second port, as they live on another host at the Hub, so that a client that
leaks its token to the storage host is caught.

Typical use, in a test:

    def test_something(hub):                              # this process talks to the double
        hub.add_repo("someone/parent", {"config.json": b"{}"})
        hub.fail("POST", r"/commit/", status=503, times=1)
        ...
        subprocess.run([...], env=hub.env)                # and so does a child process

The fixture `hub` sets the client up for this process and takes that back at the end of the test. Repositories
can be filled and read without HTTP through `add_repo`, `commit`, `files` and `commits`; `requests` records
every request.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
import yaml

REPOSITORY_TYPES = ("model", "dataset")
LFS_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".parquet",
    ".h5",
    ".onnx",
    ".npz",
    ".zip",
    ".gz",
    ".msgpack",
)
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
REGULAR_FILE_LIMIT = 10 * 1024 * 1024
LICENSES = frozenset(  # https://huggingface.co/docs/hub/repositories-licenses
    re.split(
        r"\s+",
        """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
        bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
        c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
        cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
        cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
        ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
        lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
        openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
        deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3
        llama4 grok2-community gemma unknown other""",
    )
)
RELATIONS = frozenset({"adapter", "merge", "quantized", "finetune"})
REPO_ID = re.compile(r"^(?:[\w.-]+/)?[\w.-]+$")


def git_blob_id(content: bytes) -> str:
    """The object id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class StoredFile:
    """One file of one commit; the content of a large file is looked up by its sha256."""

    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else git_blob_id(self.content)

    @property
    def blob_id(self) -> str:
        return git_blob_id(lfs_pointer(self.sha256, len(self.content)) if self.is_lfs else self.content)

    def describe(self, path: str) -> dict[str, Any]:
        """The entry of a tree listing."""
        entry: dict[str, Any] = {"type": "file", "oid": self.blob_id, "size": len(self.content), "path": path}
        if self.is_lfs:
            pointer_size = len(lfs_pointer(self.sha256, len(self.content)))
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": pointer_size}
        return entry


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    message: str
    description: str
    author: str
    date: str
    files: Mapping[str, StoredFile]


@dataclass
class Repository:
    repo_type: str
    repo_id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[0]

    def resolve(self, revision: str) -> Commit | None:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        return self.commits.get(revision)


@dataclass(frozen=True)
class User:
    name: str
    role: str
    organizations: tuple[str, ...]
    writable: tuple[str, ...] = ()

    def may_write_to(self, namespace: str) -> bool:
        if self.role == "fineGrained" and namespace not in self.writable:
            return False
        return self.role in ("write", "fineGrained") and namespace in (self.name, *self.organizations)


@dataclass(frozen=True)
class Request:
    """What the double was asked: `path` without the query, `user` as the token says, `status` as answered."""

    method: str
    path: str
    query: str
    user: str | None
    status: int
    body_bytes: int
    on_storage_host: bool
    has_token: bool


@dataclass
class Fault:
    """A failure on demand; `HubDouble.fail` describes the fields."""

    method: str
    pattern: re.Pattern[str]
    status: int
    error_code: str | None
    message: str | None
    headers: Mapping[str, str]
    times: int
    skip: int
    drop: bool
    applies_after: bool


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str | None, message: str, *, body: Any = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body, self.headers = status, code, message, body, headers


@dataclass
class Answer:
    status: int = 200
    content: bytes = b""
    content_type: str = "application/json; charset=utf-8"
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, **headers: str) -> "Answer":
        return cls(status, json.dumps(value).encode(), headers=headers)


class HubDouble:
    """A Hub of one's own: start it with `with HubDouble(home) as hub:` or take the fixture `hub`.

    Attributes:
        endpoint: What HF_ENDPOINT is to be.
        token: A token of the user "me" that may write.
        env: The environment for a child process that is to talk to this double.
        requests: Every request since the start.
        page_size: Entries on one page of a listing.
        storage_limit: Bytes of large files that one namespace may hold; no limit where None.
        file_limit: Bytes of one large file.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.users: dict[str, User] = {}
        self.requests: list[Request] = []
        self.page_size = 1000
        self.storage_limit: int | None = None
        self.file_limit: int | None = None
        self.expired: set[str] = set()
        self.lock = threading.RLock()
        self._faults: list[Fault] = []
        self._clock = datetime(2026, 1, 1, tzinfo=timezone.utc)
        self.token = self.add_user("me")
        self._servers: list[ThreadingHTTPServer] = []

    # -- life

    def __enter__(self) -> "HubDouble":
        for role in ("api", "storage"):
            handler = type(f"{role.capitalize()}Handler", (_Handler,), {"hub": self, "is_storage": role == "storage"})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage_endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    @property
    def client_environment(self) -> dict[str, str]:
        """The variables that the Hub's client reads."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    @property
    def env(self) -> dict[str, str]:
        """The environment of this process, changed so that a child process talks to this double."""
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_OFFLINE"))
        }
        return inherited | self.client_environment

    def api(self, token: str | bool | None = None) -> Any:
        """A client of this double: as the user "me", as the owner of `token`, or as nobody (`False`)."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token if token is None else token)

    def connect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes the client in this process talk to this double, although it read its settings at import."""
        import huggingface_hub.hf_api
        from huggingface_hub import constants

        for name, value in self.client_environment.items():
            monkeypatch.setenv(name, value)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HOME", str(self.home))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(self.home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(self.home / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(self.home / "stored_tokens"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The functions at the top of huggingface_hub, and transformers, share one client each.
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.endpoint)
        try:
            from transformers.utils import hub as transformers_hub
        except ImportError:
            return
        monkeypatch.setattr(transformers_hub, "_hf_api", None)

    # -- filling and reading without HTTP

    def add_user(
        self, name: str, *, role: str = "write", organizations: tuple[str, ...] = (), writable: tuple[str, ...] = ()
    ) -> str:
        """Registers a user, or another token of one.

        Args:
            name: The user's namespace.
            role: What the token allows, "write", "read" or "fineGrained".
            organizations: Further namespaces that the user may write to.
            writable: To which namespaces a fine-grained token may write.

        Returns:
            The token.
        """
        token = "hf_" + hashlib.sha256(f"{name}/{role}/{organizations}/{writable}".encode()).hexdigest()[:34]
        self.users[token] = User(name, role, organizations, writable)
        return token

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str] | Path | str | None = None,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: bool = False,
        granted: tuple[str, ...] = (),
    ) -> str:
        """Creates a repository.

        Args:
            repo_id: "namespace/name".
            files: Contents by path, or a local folder to copy; nothing for a fresh repository.
            repo_type: "model" or "dataset".
            private: Whether only its namespace sees it.
            gated: Whether its files are closed to all but its namespace and `granted`.
            granted: Users who may read a gated repository.

        Returns:
            The hash of its last commit.
        """
        with self.lock:
            assert (repo_type, repo_id) not in self.repositories, f"{repo_id} exists"
            repository = Repository(repo_type, repo_id, private, gated, set(granted))
            self.repositories[repo_type, repo_id] = repository
            attributes = {".gitattributes": StoredFile(GITATTRIBUTES)}
            sha = self._commit(repository, "refs/heads/main", attributes, "initial commit", "", repository.namespace)
        return self.commit(repo_id, files, repo_type=repo_type) if files is not None else sha

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | None] | Path | str,
        *,
        repo_type: str = "model",
        revision: str = "main",
        message: str = "Upload",
    ) -> str:
        """Adds a commit to a branch, which is created if need be; a file that is None is deleted."""
        if isinstance(files, (str, Path)):
            root = Path(files)
            files = {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        with self.lock:
            repository = self.repositories[repo_type, repo_id]
            parent = repository.resolve(revision) or repository.resolve("main")
            assert parent is not None
            tree = dict(parent.files)
            for path, content in files.items():
                if content is None:
                    del tree[path]
                    continue
                content = content.encode() if isinstance(content, str) else content
                stored = StoredFile(content, self.upload_mode(path, content[:512], len(content)) == "lfs")
                if stored.is_lfs:
                    self.blobs[stored.sha256] = content
                tree[path] = stored
            author = repository.namespace
            return self._commit(repository, f"refs/heads/{revision}", tree, message, "", author, parent.sha)

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """The contents of a repository by path, without .gitattributes."""
        commit = self.repositories[repo_type, repo_id].resolve(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return {path: stored.content for path, stored in commit.files.items() if path != ".gitattributes"}

    def commits(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> list[Commit]:
        """The history of a revision, newest first; the oldest commit holds only .gitattributes."""
        repository = self.repositories[repo_type, repo_id]
        commit = repository.resolve(revision)
        history = []
        while commit is not None:
            history.append(commit)
            commit = repository.commits[commit.parent] if commit.parent else None
        return history

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        status: int = 503,
        error_code: str | None = None,
        message: str | None = None,
        headers: Mapping[str, str] | None = None,
        times: int = 1,
        skip: int = 0,
        drop: bool = False,
        applies_after: bool = False,
    ) -> None:
        """Makes requests fail.

        Args:
            method: The HTTP method.
            pattern: A regular expression that is searched in the path, both hosts alike.
            status: What is answered.
            error_code: The header X-Error-Code.
            message: The header X-Error-Message and the "error" of the body.
            headers: Further headers, say Retry-After.
            times: How many requests fail; after that they are served.
            skip: How many matching requests are served first.
            drop: Closes the connection, in the middle of the body where there is one, instead of answering.
            applies_after: Serves the request first and fails only its answer, so that it has taken effect.
        """
        fault = Fault(
            method,
            re.compile(pattern),
            status,
            error_code,
            message,
            headers or {},
            times,
            skip,
            drop,
            applies_after,
        )
        with self.lock:
            self._faults.append(fault)

    def heal(self) -> None:
        """Takes all failures and limits back."""
        with self.lock:
            self._faults.clear()
            self.expired.clear()
            self.storage_limit = self.file_limit = None

    # -- what the handlers use

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.method != method or not fault.pattern.search(path) or fault.times == 0:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def upload_mode(self, path: str, sample: bytes, size: int) -> str:
        is_large = path.endswith(LFS_SUFFIXES) or size > REGULAR_FILE_LIMIT or b"\0" in sample
        return "lfs" if is_large else "regular"

    def _commit(
        self,
        repository: Repository,
        ref: str,
        files: Mapping[str, StoredFile],
        message: str,
        description: str,
        author: str,
        parent: str | None = None,
    ) -> str:
        self._clock += timedelta(seconds=1)
        date = self._clock.isoformat().replace("+00:00", ".000Z")
        tree = json.dumps({path: stored.blob_id for path, stored in sorted(files.items())})
        identity = "\0".join([repository.repo_type, repository.repo_id, ref, parent or "", tree, message, date])
        sha = hashlib.sha1(identity.encode()).hexdigest()
        repository.commits[sha] = Commit(sha, parent, message, description, author, date, dict(files))
        repository.refs[ref] = sha
        return sha


def front_matter(readme: str) -> tuple[Any, str | None]:
    """The metadata of a card, or what is wrong with its YAML."""
    match = re.match(r"^\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|$)", readme, re.DOTALL)
    if match is None:
        return None, None
    try:
        return yaml.safe_load(match.group(1)), None
    except yaml.YAMLError as error:
        return None, f"YAML is not valid: {error}"


def validate_card(readme: str) -> tuple[list[str], list[str]]:
    """The rules of the Hub for the metadata of a model card.

    Returns:
        The errors, which forbid an upload, and the warnings, which do not.
    """
    data, problem = front_matter(readme)
    if problem is not None:
        return [problem], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    errors: list[str] = []

    def strings(key: str, pattern: re.Pattern[str] | None = None) -> list[str]:
        value = data.get(key)
        if value is None:
            return []
        values = value if isinstance(value, list) else [value]
        for index, item in enumerate(values):
            place = f'"{key}[{index}]"' if isinstance(value, list) else f'"{key}"'
            if not isinstance(item, str):
                errors.append(f"{place} must be a string")
            elif pattern is not None and not pattern.match(item):
                errors.append(f"{place} with value {item!r} is not valid. Use a model id from https://hf.co/models.")
        return [item for item in values if isinstance(item, str)]

    errors += [
        f'"license" must be one of the known licenses, not {x!r}' for x in strings("license") if x not in LICENSES
    ]
    if not re.fullmatch(r"[a-z0-9.-]+", str(data.get("license_name", "none"))):
        errors.append('"license_name" must match /^[a-z0-9-.]+$/')
    strings("base_model", REPO_ID)
    strings("datasets", REPO_ID)
    strings("tags")
    strings("metrics")
    for code in strings("language"):
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", code):
            errors.append(f'"language" must only contain lowercase characters: {code!r} is not an ISO 639 code')
    for key in ("pipeline_tag", "library_name"):
        if key in data and not isinstance(data[key], str):
            errors.append(f'"{key}" must be a string')
    if "base_model_relation" in data and data["base_model_relation"] not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    if "model-index" in data:
        errors += _validate_model_index(data["model-index"])
    return errors, []


def _validate_model_index(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for m, model in enumerate(index):
        if not isinstance(model.get("name"), str):
            errors.append(f'"model-index[{m}].name" is required')
        results = model.get("results")
        if not isinstance(results, list):
            errors.append(f'"model-index[{m}].results" must be an array')
            continue
        for r, result in enumerate(results):
            place = f"model-index[{m}].results[{r}]"
            if not isinstance(result.get("task", {}).get("type"), str):
                errors.append(f'"{place}.task.type" is required')
            for key in ("type", "name"):
                if not isinstance(result.get("dataset", {}).get(key), str):
                    errors.append(f'"{place}.dataset.{key}" is required')
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{place}.metrics" must be a non-empty array')
                continue
            for k, metric in enumerate(metrics):
                for key in ("type", "value"):
                    if metric.get(key) is None:
                        errors.append(f'"{place}.metrics[{k}].{key}" is required')
    return errors


class _Handler(BaseHTTPRequestHandler):
    """One connection; subclasses carry the double and whether this is the storage host."""

    hub: HubDouble
    is_storage: bool
    protocol_version = "HTTP/1.1"
    timeout = 60
    # Headers and body are written apart; a body that waits for the headers' receipt waits 40 ms.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        fault = self.hub.take_fault(self.command, path)
        body = b""
        user: User | None = None
        try:
            if fault is not None and fault.drop and not fault.applies_after:
                # Half of what was announced is read, so that the client is cut in the middle of an upload.
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
                self._record(path, url.query, None, 0, 0)
                self._hang_up()
                return
            body = self._read_body()
            user = self._user()
            if fault is not None and not fault.applies_after:
                raise Refusal(fault.status, fault.error_code, fault.message or "failure on demand", **fault.headers)
            with self.hub.lock:
                answer = self._answer(path, url.path, parse_qs(url.query), body, user)
            if fault is not None:
                if fault.drop:
                    self._record(path, url.query, user, 0, len(body))
                    self._hang_up()
                    return
                raise Refusal(fault.status, fault.error_code, fault.message or "failure on demand", **fault.headers)
        except Refusal as refusal:
            content = refusal.body if refusal.body is not None else {"error": refusal.message}
            answer = Answer.of(content, refusal.status, **{"X-Error-Message": refusal.message}, **refusal.headers)
            if refusal.code is not None:
                answer.headers["X-Error-Code"] = refusal.code
        self._record(path, url.query, user, answer.status, len(body))
        self._send(answer)

    def _record(self, path: str, query: str, user: User | None, status: int, body_bytes: int) -> None:
        has_token = "Authorization" in self.headers
        name = user.name if user else None
        request = Request(self.command, path, query, name, status, body_bytes, self.is_storage, has_token)
        with self.hub.lock:
            self.hub.requests.append(request)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _user(self) -> User | None:
        authorization = self.headers.get("Authorization")
        if authorization is None or self.is_storage:
            return None
        token = authorization.removeprefix("Bearer ")
        user = self.hub.users.get(token)
        if user is None:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        if token in self.hub.expired:
            raise Refusal(401, None, 'User Access Token "test" is expired')
        return user

    def _send(self, answer: Answer) -> None:
        content, status, headers = answer.content, answer.status, dict(answer.headers)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and status == 200 and self.command == "GET":
            start, end = int(span.group(1)), int(span.group(2) or len(content) - 1)
            if start >= len(content):
                status, headers["Content-Range"], content = 416, f"bytes */{len(content)}", b""
            else:
                headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
                status, content = 206, content[start : end + 1]
        self.send_response(status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            # A header holds latin-1 on one line.
            self.send_header(name, value.replace("\n", " ").encode("latin-1", "replace").decode("latin-1"))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # -- routes

    def _answer(self, path: str, raw_path: str, query: dict[str, list[str]], body: bytes, user: User | None) -> Answer:
        if self.is_storage:
            return self._storage(path, body)
        route = (self.command, path)
        if route == ("GET", "/api/whoami-v2"):
            return self._whoami(user)
        if route == ("POST", "/api/repos/create"):
            return self._create_repository(json.loads(body), user)
        if route == ("DELETE", "/api/repos/delete"):
            return self._delete_repository(json.loads(body), user)
        if route == ("POST", "/api/validate-yaml"):
            errors, warnings = validate_card(json.loads(body)["content"])
            listed = {
                "errors": [{"message": message} for message in errors],
                "warnings": [{"message": message} for message in warnings],
            }
            return Answer.of(listed, 400 if errors else 200)
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(.*))?", path):
            repo_type, repo_id, rest = match.group(1), match.group(2), match.group(3) or ""
            raw_rest = raw_path.split("/", 5)[5] if rest else ""
            return self._repository_api(repo_type, repo_id, raw_rest, query, body, user)
        prefix = r"/(?:(dataset)s/)?([^/]+/[^/]+)"
        if match := re.fullmatch(prefix + r"\.git/info/lfs/objects/(batch|verify)", path):
            repository = self._find(match.group(1) or "model", match.group(2), user)
            return self._lfs(repository, match.group(3), json.loads(body), user)
        if match := re.fullmatch(prefix + r"/resolve/([^/]+)/(.+)", raw_path):
            repository = self._find(match.group(1) or "model", unquote(match.group(2)), user)
            return self._resolve(repository, unquote(match.group(3)), unquote(match.group(4)), user)
        raise Refusal(404, None, f"no such page: {path}")

    def _storage(self, path: str, body: bytes) -> Answer:
        sha256 = path.rsplit("/", 1)[-1]
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != sha256:
                raise Refusal(400, None, "the content does not have the announced sha256")
            self.hub.blobs[sha256] = body
            return Answer(headers={"ETag": f'"{sha256}"'})
        if sha256 not in self.hub.blobs:
            raise Refusal(404, None, "no such object")
        return Answer(200, self.hub.blobs[sha256], "application/octet-stream", {"ETag": f'"{sha256}"'})

    def _whoami(self, user: User | None) -> Answer:
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.organizations]
        token: dict[str, Any] = {"displayName": "test", "role": user.role}
        if user.role == "fineGrained":
            scopes = [
                {"entity": {"type": "user", "name": name}, "permissions": ["repo.write"]} for name in user.writable
            ]
            token["fineGrained"] = {"global": ["discussion.write"], "scoped": scopes}
        auth = {"type": "access_token", "accessToken": token}
        return Answer.of({"type": "user", "name": user.name, "orgs": organizations, "auth": auth})

    def _create_repository(self, wanted: dict[str, Any], user: User | None) -> Answer:
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        repo_type = wanted.get("type") or "model"
        namespace = wanted.get("organization") or user.name
        repo_id = f"{namespace}/{wanted['name']}"
        if not user.may_write_to(namespace):
            message = f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"'
            raise Refusal(403, None, message)
        url = f"{self.hub.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
        if (repo_type, repo_id) in self.hub.repositories:
            body = {"error": f"You already created this {repo_type} repo", "url": url}
            raise Refusal(409, None, body["error"], body=body)
        self.hub.add_repo(repo_id, repo_type=repo_type, private=wanted.get("visibility") == "private")
        return Answer.of({"url": url, "name": repo_id, "id": hashlib.sha1(url.encode()).hexdigest()[:24]})

    def _delete_repository(self, wanted: dict[str, Any], user: User | None) -> Answer:
        namespace = wanted.get("organization") or (user.name if user else "")
        key = (wanted.get("type") or "model", f"{namespace}/{wanted['name']}")
        repository = self._find(*key, user)
        self._require_write(repository, user)
        del self.hub.repositories[key]
        return Answer()

    def _find(self, repo_type: str, repo_id: str, user: User | None) -> Repository:
        """The repository, if this user may know that it exists."""
        repository = self.hub.repositories.get((repo_type, repo_id))
        is_hidden = repository is not None and repository.private and not self._belongs(repository, user)
        if repository is None or is_hidden:
            status = 401 if user is None else 404
            message = "Invalid username or password." if user is None else "Repository not found"
            raise Refusal(status, "RepoNotFound", message)
        return repository

    def _belongs(self, repository: Repository, user: User | None) -> bool:
        return user is not None and repository.namespace in (user.name, *user.organizations)

    def _require_read(self, repository: Repository, user: User | None) -> None:
        if not repository.gated or self._belongs(repository, user):
            return
        if user is None or user.name not in repository.granted:
            page = f"{self.hub.endpoint}/{repository.repo_id}"
            why = "You must be authenticated" if user is None else "You are not in the authorized list. Visit " + page
            message = f"Access to {repository.repo_type} {repository.repo_id} is restricted. {why} for access."
            raise Refusal(401 if user is None else 403, "GatedRepo", message)

    def _require_write(self, repository: Repository, user: User | None) -> None:
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        if not user.may_write_to(repository.namespace):
            raise Refusal(403, None, "Forbidden: you must use a write token to upload to a repository.")

    def _revision(self, repository: Repository, revision: str) -> Commit:
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _repository_api(
        self,
        repo_type: str,
        repo_id: str,
        rest: str,
        query: dict[str, list[str]],
        body: bytes,
        user: User | None,
    ) -> Answer:
        repository = self._find(repo_type, repo_id, user)
        action, _, argument = rest.partition("/")
        verb = (self.command, action)
        revision, _, tail = argument.partition("/")
        revision, tail = unquote(revision), unquote(tail)
        if verb == ("GET", "") or verb == ("GET", "revision"):
            commit = self._revision(repository, unquote(argument) if argument else "main")
            return self._info(repository, commit, with_blobs="blobs" in query)
        if verb == ("GET", "tree"):
            return self._tree(repository, self._revision(repository, revision), tail, query, rest)
        if verb == ("POST", "paths-info"):
            form = parse_qs(body.decode())
            commit = self._revision(repository, revision)
            return Answer.of([commit.files[p].describe(p) for p in form.get("paths", []) if p in commit.files])
        if verb == ("POST", "preupload"):
            return self._preupload(repository, revision, json.loads(body), query, user)
        if verb == ("POST", "commit"):
            return self._receive_commit(repository, revision, body, query, user)
        if verb == ("GET", "refs"):
            return self._refs(repository, with_pull_requests="include_prs" in query)
        if verb == ("GET", "commits"):
            self._revision(repository, revision)
            history = self.hub.commits(repo_id, revision, repo_type=repo_type)
            return Answer.of(
                [
                    {
                        "id": commit.sha,
                        "title": commit.message,
                        "message": commit.description,
                        "date": commit.date,
                        "authors": [{"user": commit.author}],
                    }
                    for commit in history
                ]
            )
        if verb == ("POST", "branch") or verb == ("POST", "tag"):
            return self._create_ref(repository, action, unquote(argument), json.loads(body or b"{}"), user)
        if verb == ("GET", "discussions"):
            return self._discussions(repository, query)
        if verb == ("GET", "auth-check"):
            if argument == "write":
                self._require_write(repository, user)
            else:
                self._require_read(repository, user)
            return Answer.of({})
        raise Refusal(404, None, f"Sorry, we can't find the page you are looking for: {rest}")

    def _info(self, repository: Repository, commit: Commit, *, with_blobs: bool) -> Answer:
        readme = commit.files.get("README.md")
        card, _ = front_matter(readme.content.decode("utf-8", "replace")) if readme else (None, None)
        card = card if isinstance(card, dict) else {}
        siblings = []
        for path, stored in sorted(commit.files.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if with_blobs:
                entry = stored.describe(path)
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    pointer_size = entry["lfs"]["pointerSize"]
                    sibling["lfs"] = {
                        "size": entry["size"],
                        "sha256": stored.sha256,
                        "pointerSize": pointer_size,
                    }
            siblings.append(sibling)
        dates = [other.date for other in repository.commits.values()]
        info = {
            "_id": hashlib.sha1(repository.repo_id.encode()).hexdigest()[:24],
            "id": repository.repo_id,
            "author": repository.namespace,
            "sha": commit.sha,
            "createdAt": min(dates),
            "lastModified": max(dates),
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "cardData": card,
            "siblings": siblings,
        }
        for key in ("pipeline_tag", "library_name", "model-index"):
            if key in card:
                info[key] = card[key]
        return Answer.of(info)

    def _tree(
        self, repository: Repository, commit: Commit, folder: str, query: dict[str, list[str]], rest: str
    ) -> Answer:
        is_recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = folder.rstrip("/") + "/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, stored in sorted(commit.files.items()):
            if not path.startswith(prefix):
                continue
            below = path[len(prefix) :].split("/")
            for depth in range(1, len(below)):
                name = prefix + "/".join(below[:depth])
                if depth == 1 or is_recursive:
                    oid = hashlib.sha1(name.encode()).hexdigest()
                    entries[name] = {"type": "directory", "oid": oid, "size": 0, "path": name}
            if len(below) == 1 or is_recursive:
                entries[path] = stored.describe(path)
        if prefix and not entries:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {repository.repo_id}")
        start = int(query.get("cursor", ["0"])[0])
        page = list(entries.values())[start : start + self.hub.page_size]
        headers = {}
        if start + len(page) < len(entries):
            base = f"{self.hub.endpoint}/api/{repository.repo_type}s/{repository.repo_id}/{rest}"
            headers["Link"] = f'<{base}?recursive={is_recursive}&cursor={start + len(page)}>; rel="next"'
        return Answer.of(page, **headers)

    def _preupload(
        self,
        repository: Repository,
        revision: str,
        wanted: dict[str, Any],
        query: dict[str, list[str]],
        user: User | None,
    ) -> Answer:
        if "create_pr" not in query:
            self._require_write(repository, user)
        commit = self._revision(repository, revision)
        listed = []
        for file in wanted["files"]:
            mode = self.hub.upload_mode(file["path"], base64.b64decode(file["sample"]), file["size"])
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in commit.files:
                entry["oid"] = commit.files[file["path"]].etag
            listed.append(entry)
        return Answer.of({"files": listed})

    def _lfs(self, repository: Repository, action: str, wanted: dict[str, Any], user: User | None) -> Answer:
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        if action == "verify":
            content = self.hub.blobs.get(wanted["oid"])
            if content is None or len(content) != wanted["size"]:
                raise Refusal(404, None, "the object was not uploaded, or not whole")
            return Answer.of({})
        asked = sum(item["size"] for item in wanted["objects"])
        if self.hub.storage_limit is not None and asked > self.hub.storage_limit:
            message = (
                "Private repository storage limit reached, please upgrade your plan to increase your private storage"
            )
            raise Refusal(403, None, message)
        objects = []
        page = f"{self.hub.endpoint}/{repository.repo_id}.git/info/lfs/objects"
        for item in wanted["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if self.hub.file_limit is not None and item["size"] > self.hub.file_limit:
                entry["error"] = {"code": 413, "message": "the file is larger than the maximum, it is too large"}
            elif item["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.storage_endpoint}/{item['oid']}?signature=valid"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{page}/verify"}}
            objects.append(entry)
        return Answer.of({"transfer": "basic", "objects": objects})

    def _receive_commit(
        self,
        repository: Repository,
        revision: str,
        body: bytes,
        query: dict[str, list[str]],
        user: User | None,
    ) -> Answer:
        is_pull_request = "create_pr" in query
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        if not is_pull_request:
            self._require_write(repository, user)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = lines[0]["value"]
        parent = self._revision(repository, revision)
        if header.get("parentCommit") and not parent.sha.startswith(header["parentCommit"]):
            raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        if "README.md" in files:
            errors, _ = validate_card(files["README.md"].content.decode("utf-8", "replace"))
            if errors:
                raise Refusal(400, None, "Invalid metadata in README.md. " + "; ".join(errors))
        ref = f"refs/heads/{revision}"
        if revision.startswith("refs/"):
            ref = revision
        elif repository.commits.get(revision) is not None:
            raise Refusal(400, None, "cannot commit to a commit; name a branch")
        number = None
        if is_pull_request:
            number = len(repository.pull_requests) + 1
            ref = f"refs/pr/{number}"
        sha = self.hub._commit(
            repository, ref, files, header["summary"], header.get("description", ""), user.name, parent.sha
        )
        page = f"{self.hub.endpoint}/{'datasets/' * (repository.repo_type == 'dataset')}{repository.repo_id}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}"}
        if number is not None:
            date = repository.commits[sha].date
            repository.pull_requests.append(
                {
                    "num": number,
                    "title": header["summary"],
                    "author": {"name": user.name},
                    "createdAt": date,
                    "status": "open",
                    "repo": {"name": repository.repo_id, "type": repository.repo_type},
                    "isPullRequest": True,
                }
            )
            answer["pullRequestUrl"] = f"{page}/discussions/{number}"
        return Answer.of(answer)

    def _apply(self, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
        """Changes a tree as one line of a commit asks."""
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            if self.hub.upload_mode(path, content[:512], len(content)) != "regular":
                raise Refusal(400, None, f"Your push was rejected because it contains binary files: {path}")
            files[path] = StoredFile(content)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise Refusal(400, None, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = StoredFile(self.hub.blobs[value["oid"]], is_lfs=True)
        elif key == "deletedFile":
            if path not in files:
                raise Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            del files[path]
        elif key == "deletedFolder":
            inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
            for name in inside:
                del files[name]
        else:
            raise Refusal(400, None, f"unknown operation {key}")

    def _refs(self, repository: Repository, *, with_pull_requests: bool) -> Answer:
        listed: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
        if with_pull_requests:
            listed["pullRequests"] = []
        kinds = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
        for ref, sha in repository.refs.items():
            kind, name = ref.removeprefix("refs/").split("/", 1)
            if kinds[kind] in listed:
                listed[kinds[kind]].append({"name": name, "ref": ref, "targetCommit": sha})
        return Answer.of(listed)

    def _create_ref(
        self, repository: Repository, kind: str, name: str, wanted: dict[str, Any], user: User | None
    ) -> Answer:
        self._require_write(repository, user)
        if kind == "branch":
            ref, start = f"refs/heads/{name}", wanted.get("startingPoint", "main")
        else:
            ref, start = f"refs/tags/{wanted['tag']}", name
        if ref in repository.refs:
            raise Refusal(409, None, f"Reference {ref} already exists")
        repository.refs[ref] = self._revision(repository, start).sha
        return Answer.of({})

    def _discussions(self, repository: Repository, query: dict[str, list[str]]) -> Answer:
        listed = repository.pull_requests
        if "status" in query and query["status"] != ["all"]:
            listed = [item for item in listed if item["status"] in query["status"]]
        if "author" in query:
            listed = [item for item in listed if item["author"]["name"] in query["author"]]
        listed = list(reversed(listed))
        return Answer.of({"discussions": listed, "count": len(listed), "start": 0})

    def _resolve(self, repository: Repository, revision: str, path: str, user: User | None) -> Answer:
        self._require_read(repository, user)
        commit = self._revision(repository, revision)
        stored = commit.files.get(path)
        if stored is None:
            headers = {"X-Repo-Commit": commit.sha}
            raise Refusal(404, "EntryNotFound", "Entry not found", **headers)
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{stored.etag}"', "Accept-Ranges": "bytes"}
        if not stored.is_lfs:
            return Answer(200, stored.content, "text/plain; charset=utf-8", headers)
        headers |= {
            "X-Linked-ETag": f'"{stored.sha256}"',
            "X-Linked-Size": str(len(stored.content)),
            "Location": f"{self.hub.storage_endpoint}/{quote(repository.repo_id)}/{stored.sha256}",
        }
        return Answer(302, b"", "text/plain; charset=utf-8", headers)


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    """A fresh double that the Hub's client in this process talks to."""
    from huggingface_hub.utils import close_session

    with HubDouble(tmp_path_factory.mktemp("hf_home")) as double:
        double.connect(monkeypatch)
        close_session()
        yield double
        close_session()
