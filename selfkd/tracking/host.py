"""W&B's host: where it is, whether there is a key for it, whether it answers."""

from __future__ import annotations

import contextlib
import http.client
import netrc
import os
import ssl
import threading
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from selfkd.tracking.surroundings import keys_file, settings

REACH_SECONDS = 3.0
"""Time in which a host must answer."""
EARLIER_HOST = "api.wandb.ai"
"""Host under which earlier clients kept their keys, and where `wandb login` still finds them."""


def base_url() -> str:
    """Return the URL of the host: of WANDB_BASE_URL, `wandb login --host`, or W&B's default.

    Raises:
        ConfigError: W&B refuses it.
    """
    return str(settings().base_url)


def has_key(url: str) -> bool:
    """Say whether there is a key for a host: in WANDB_API_KEY, or where `wandb login` puts it.

    >>> os.environ["WANDB_API_KEY"] = "an example"
    >>> has_key("https://example.com")
    True
    >>> del os.environ["WANDB_API_KEY"]
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(url).netloc
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc(keys_file()).hosts  # whoever may read it: by its name W&B takes it
        return host in known or ("WANDB_BASE_URL" not in os.environ and EARLIER_HOST in known)
    return False


def answers(url: str, *, seconds: float = REACH_SECONDS) -> bool:
    """Say whether a host answers within some seconds, through a proxy if there is one.

    Args:
        url: URL of the host.
        seconds: Seconds to wait, the look-up of its name included.
    """
    found: list[bool] = []
    request = threading.Thread(target=lambda: found.append(_reach(url, seconds)), daemon=True)
    request.start()
    request.join(seconds)  # a look-up of a name has no time-out of its own
    return bool(found and found[0])


def _reach(url: str, seconds: float) -> bool:
    if urlsplit(url).scheme not in ("http", "https"):
        return False
    try:
        with urllib.request.urlopen(url, timeout=seconds):  # noqa: S310 - http or https
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:  # W&B's client trusts other certificates than Python
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError, http.client.HTTPException):
        return False
