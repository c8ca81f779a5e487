"""What the Hub's client raises, as one message that says what to do and never holds a token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_llfc.errors import PublishingError

_TOKEN = re.compile(r"(?<=Bearer )\S+|\b(?:hf|api)_(?!llfc)[A-Za-z0-9_]{6,}(?:[.-][A-Za-z0-9_-]+)*")
_STORAGE = re.compile(r"storage|quota|too large|exceeds? the (?:maximum|limit)", re.IGNORECASE)
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "hf_xet")


class UnansweredError(PublishingError):
    """A request may or may not have taken effect: the connection broke, or the Hub failed after accepting it."""


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turns whatever the client raises into one message that says what to do, without a token in it.

    Args:
        doing: What is being done, as the message begins.

    Raises:
        PublishingError: In place of anything else; no other error hangs on it.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except PublishingError:
        raise
    except LocalTokenNotFoundError:
        raise PublishingError("you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise PublishingError("the Hub's client is set to offline: unset HF_HUB_OFFLINE to push") from None
    except HfHubHTTPError as error:
        raise _http_problem(doing, error) from None
    except Exception as error:
        raise _other_problem(doing, error) from None


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = without_token(str(error)).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def without_token(text: str) -> str:
    """A text in which everything that looks like a token is left out."""
    return _TOKEN.sub("…", text)


def _http_problem(doing: str, error: Any) -> PublishingError:
    """The message for an answer of the Hub that is an error."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    from huggingface_hub.utils import parse_ratelimit_headers

    status = error.response.status_code
    said = without_token(error.server_message or "").strip().splitlines()
    because = f" ({said[0].rstrip('.')})" if said else ""
    if isinstance(error, GatedRepoError):
        return PublishingError(f"{doing} failed: the repository is gated{because}; ask for access on its page")
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return PublishingError(f"{doing} failed: the Hub does not accept your token{because}; run `hf auth login`")
    if status == 413 or (status in (402, 403) and _STORAGE.search(because)):
        return PublishingError(_no_room(doing, because))
    if status == 403:
        return PublishingError(f"{doing} failed: you have no right to{because}; check the token and the namespace")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return PublishingError(f"{doing} failed: not found{because}; check the name and the rights of your token")
    if status == 412:
        return PublishingError(f"{doing} failed: somebody committed meanwhile; push again")
    if status == 409:
        return PublishingError(
            f"{doing} failed: somebody else changed the repository at the same time{because}; push again"
        )
    if status == 429:
        limit = parse_ratelimit_headers(error.response.headers)
        wait = error.response.headers.get("Retry-After") or (limit.reset_in_seconds if limit is not None else None)
        when = f"in {wait} seconds" if wait else "later"
        return PublishingError(f"{doing} failed: too many requests; push again {when}, what is uploaded stays")
    if status >= 500:
        return UnansweredError(f"{doing} failed: the Hub has a problem ({status}); push again, what is uploaded stays")
    return PublishingError(f"{doing} failed: the Hub answered {status}{because}")


def _other_problem(doing: str, error: Exception) -> PublishingError:
    """The message for everything else: the client wraps what happens to an upload in its own errors."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            return _http_problem(f"{doing}: {first_line(error)}", cause)
        # The client changed its HTTP library between releases, so that its errors cannot be named here.
        if type(cause).__module__.partition(".")[0] in _TRANSPORTS or isinstance(cause, OSError):
            reason = f"{type(cause).__name__}: {first_line(cause)}" if str(cause) else type(cause).__name__
            return UnansweredError(
                f"{doing} failed: the connection broke ({reason}); push again, what is uploaded stays"
            )
        cause = cause.__cause__
    # The storage host refuses single files in the body of an answer, which the client passes on in several lines.
    said = " ".join(without_token(str(error)).split()).rstrip(".") or type(error).__name__
    if _STORAGE.search(said):
        return PublishingError(_no_room(doing, f" ({said})"))
    return PublishingError(f"{doing} failed: {said}")


def _no_room(doing: str, because: str) -> str:
    return (
        f"{doing} failed: the Hub takes no upload of this size{because}; make room in the storage settings, push to "
        "another namespace, or merge again with a smaller max_shard_size if a single file is too large"
    )
