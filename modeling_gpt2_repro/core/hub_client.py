"""Questions to the Hugging Face Hub that are answered at once, or fail at once with one line."""

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
# Seconds to wait before a question is repeated to a Hub that answers "not now".
PAUSES = (1, 3)

GATED = "is gated: accept its terms on the Hub and run `hf auth login`"

Answer = TypeVar("Answer")


class HubUnreachableError(ConnectionError):
    """The Hub gave no answer: no network, no such host, offline mode, or a server error."""


class HubForbiddenError(UserError):
    """The Hub knows this user, who may not do what was asked (403)."""


def ask_hub(question: Callable[[], Answer], what: str) -> Answer:
    """Return `question()`, one call of `huggingface_hub.HfApi` about `what` ("dataset a/b").

    The libraries above `HfApi` retry for up to a minute before they give up; a plain question first keeps an offline
    start quick and quiet. It is repeated only where the Hub is there and asks for patience.

    Raises:
        UserError: the Hub answered that there is no such thing, or that it is not for this user (the latter, where it
            knows the user, as a `HubForbiddenError`).
        HubUnreachableError: it did not answer.
    """
    for pause in (*PAUSES, None):
        try:
            return question()
        except GatedRepoError as error:
            raise UserError(f"the {what} {GATED}") from error
        except RevisionNotFoundError as error:
            raise UserError(f"the {what} has no such --revision") from error
        except HFValidationError as error:
            raise UserError(f"the {what} is no local folder, and no name on the Hub: check the name") from error
        except RepositoryNotFoundError as error:
            raise UserError(f"the Hub has no {what} (if it is private: run `hf auth login`)") from error
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                kind = HubForbiddenError if error.response.status_code == 403 else UserError
                raise kind(f"the {what}: {describe_hub_failure(error)}") from error
            if pause is None or not _is_temporary(error):
                raise HubUnreachableError(describe_hub_failure(error)) from error
            time.sleep(pause)
        except Exception as error:  # the HTTP library beneath HfApi, and so its errors, changes with the release
            raise HubUnreachableError(f"{type(error).__name__}: {error}") from error
    raise AssertionError("the last pause is none")


def describe_hub_failure(error: BaseException) -> str | None:
    """Return what failed between us and the Hub, `None` for an error of another kind.

    Libraries wrap such an error in their own, so that its causes are looked at too. Addresses, which may be signed,
    are left out.
    """
    causes = list(_list_causes(error))
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return GATED
        if isinstance(cause, HfHubHTTPError):
            status = f"{cause.response.status_code} {cause.response.reason_phrase}"
            if cause.response.status_code in (401, 403):
                return f"the Hub refuses access ({status}): run `hf auth login`"
            return f"the Hub answers {status}" + (": try again later" if _is_temporary(cause) else "")
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
