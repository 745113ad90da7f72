"""Addresses of object stores, which the command line reads before any client is loaded."""

import re

from converter.errors import OptionError
from converter.text import redacted

_STORES = {
    "abfs", "adl", "arrow_hdfs", "az", "gcs", "gs", "hdfs", "lakefs", "memory", "oci", "oss", "s3",
    "s3a", "sftp", "smb", "tos", "webdav", "webhdfs",
}  # fmt: skip
"""Schemes of fsspec that name places on servers; others are of local files, archives and code."""


def is_store(text: str) -> bool:
    """Whether ``text`` is an address of an object store, such as ``s3://bucket/prefix``."""
    scheme, sign, _ = text.partition("://")
    return bool(sign) and scheme in _STORES


def store_address(text: str) -> str:
    """An address of an object store without a slash at its end.

    Raises OptionError: it has a password or a query, or nothing after ``://``.
    """
    scheme, _, place = text.partition("://")
    place = place.rstrip("/")
    if not place or "?" in place or re.match("[^/]*:[^/]*@", place):
        raise OptionError(
            f"{redacted(f'{scheme}://{place}')} is not the address of a prefix",
            expected=f"{scheme}://bucket/prefix, without user, password and query",
            hint="the store's own variables, such as AWS_PROFILE, hold credentials",
        )
    return f"{scheme}://{place}"
