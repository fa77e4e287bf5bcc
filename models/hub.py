"""Whether the Hugging Face hub can be reached at all."""

import os
import socket
from urllib.parse import urlsplit

from huggingface_hub import constants


def hub_answers() -> bool:
    """Whether the hub's name resolves: without a network its client would retry for a minute before it gives up."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
