"""Checks whether the Hugging Face hub answers, through the proxy that the environment names; only if asked."""

import os
import urllib.error
import urllib.request
from collections.abc import Mapping

from llamahome.doctor.checks import Check, failed, one_line, passed, warned

_ENDPOINT = "https://huggingface.co"
_SECONDS = 8.0


def hub_check(environment: Mapping[str, str] = os.environ) -> Check:
    """One request for the headers of the hub's page."""
    if environment.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return warned("hub", "HF_HUB_OFFLINE is set: only models and data sets on this machine are found", "unset HF_HUB_OFFLINE")
    endpoint = environment.get("HF_ENDPOINT", _ENDPOINT)
    proxies = sorted(name for name in environment if name.lower() in ("http_proxy", "https_proxy", "all_proxy"))
    through = f" through {environment[proxies[0]]} ({proxies[0]})" if proxies else ""
    if not endpoint.startswith(("http://", "https://")):
        return failed("hub", f"HF_ENDPOINT is {endpoint!r}, which is no address", "unset HF_ENDPOINT")
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return passed("hub", f"{endpoint} answers{through} ({answer.status})")
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code != 407:
            return passed("hub", f"{endpoint} answers{through} ({error.code})")
        return failed("hub", f"{endpoint}{through}: {error.code} {error.reason}")
    except (OSError, ValueError) as error:
        unset = f"unset {' '.join(proxies)}" if proxies else None
        return failed("hub", one_line(f"{endpoint} does not answer{through}: {getattr(error, 'reason', error)}"), unset)
