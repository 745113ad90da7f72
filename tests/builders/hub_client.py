"""The Hub's client in this process, which has read its environment, led to a loopback server."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http


def connect(
    monkeypatch: pytest.MonkeyPatch, url: str, home: Path, *, offline: bool = False
) -> None:
    """Do what ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_HUB_OFFLINE`` do when the client is imported.

    The client waits between its attempts for no time at all.
    """
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home.parent / "token"))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None))
