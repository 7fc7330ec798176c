"""Calls to the Hugging Face Hub that succeed or fail quickly, with a one-line error."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from .errors import UserError

HUB_TIMEOUT_SECONDS = 10
# Seconds to wait before each retry of a request that failed with a temporary error.
PAUSES = (1, 3)

GATED = "is gated: accept its terms on the Hub and run `hf auth login`"

Answer = TypeVar("Answer")


class HubUnreachableError(ConnectionError):
    """The Hub did not answer: no network, unknown host, offline mode, or a server error."""


class HubForbiddenError(UserError):
    """The Hub authenticated the user, who lacks permission for the request (403)."""


def ask_hub(question: Callable[[], Answer], what: str) -> Answer:
    """Return `question()`, one `huggingface_hub.HfApi` call about `what` (for example "dataset a/b").

    Libraries built on `HfApi` retry for up to a minute. Calling `HfApi` first makes an offline start fail fast and
    quietly; only temporary errors reported by the Hub are retried.

    Raises:
        UserError: the repository or revision does not exist, or the user has no access.
        HubForbiddenError: the Hub authenticated the user, who has no access (a `UserError`).
        HubUnreachableError: the Hub did not answer, or failed through all retries.
    """
    for pause in (*PAUSES, None):
        try:
            return question()
        except GatedRepoError as error:
            raise UserError(f"the {what} {GATED}") from error
        except RevisionNotFoundError as error:
            raise UserError(f"the {what} has no such --revision") from error
        except HFValidationError as error:
            raise UserError(f"the {what} is neither a local folder nor a valid Hub id: check the name") from error
        except RepositoryNotFoundError as error:
            raise UserError(f"the Hub has no {what} (if it is private: run `hf auth login`)") from error
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                kind = HubForbiddenError if error.response.status_code == 403 else UserError
                raise kind(f"the {what}: {describe_hub_failure(error)}") from error
            if pause is None or not _is_temporary(error):
                raise HubUnreachableError(describe_hub_failure(error)) from error
            time.sleep(pause)
        except Exception as error:  # the HTTP library under HfApi, and thus its errors, depends on the version
            raise HubUnreachableError(f"{type(error).__name__}: {error}") from error
    raise AssertionError("the last pause is none")


def describe_hub_failure(error: BaseException) -> str | None:
    """Describe a failed Hub request, or return `None` for any other error.

    Libraries wrap these errors in their own, so the chain of causes is searched too. URLs are omitted because they may
    be signed.
    """
    causes = list(_list_causes(error))
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return GATED
        if isinstance(cause, HfHubHTTPError):
            status = f"{cause.response.status_code} {cause.response.reason_phrase}"
            if cause.response.status_code in (401, 403):
                return f"the Hub denied access ({status}): run `hf auth login`"
            return f"the Hub returned {status}" + (": try again later" if _is_temporary(cause) else "")
    for kind in (httpx.TransportError, ConnectionError, TimeoutError):
        for cause in causes:
            if isinstance(cause, kind):
                return f"the connection to the Hub failed ({type(cause).__name__}: {cause})"
    return None


def _is_temporary(error: HfHubHTTPError) -> bool:
    return error.response.status_code in (408, 429) or error.response.status_code >= 500


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
