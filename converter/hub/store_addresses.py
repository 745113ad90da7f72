"""Addresses of object stores, which the command line reads before any client is loaded."""

import re

from converter.errors import OptionError

_STORES = {
    "abfs", "adl", "arrow_hdfs", "az", "gcs", "gs", "hdfs", "lakefs", "memory", "oci", "oss", "s3",
    "s3a", "sftp", "smb", "tos", "webdav", "webhdfs",
}  # fmt: skip
"""Schemes of fsspec that name places on servers; others are of local files, archives and code."""


_BESIDE = re.compile(r"\?|::|^[^/]*:(?!\d*/).*@")
"""A query, a second address as fsspec chains them, or a password, which may have slashes."""


def is_store(text: str) -> bool:
    """Whether ``text`` is an address of an object store, such as ``s3://bucket/prefix``."""
    scheme, sign, _ = text.partition("://")
    return bool(sign) and scheme.lower() in _STORES


def store_address(text: str) -> str:
    """An address of an object store without a slash at its end.

    Raises OptionError: it has a password, a query, a second address or no place, or a part of its
    path is empty or dots.
    """
    scheme, _, place = text.partition("://")
    scheme, place = scheme.lower(), place.rstrip("/")
    parts = place.split("/")["hdfs" in scheme :]  # hdfs:///path is on the usual server
    if not parts or {"", ".", ".."}.intersection(parts) or _BESIDE.search(place):
        public = place.rpartition("@")[2].partition("?")[0]
        raise OptionError(
            f"{scheme}://{public} is not the address of a prefix",
            expected=f"{scheme}://bucket/prefix, without user, password and query",
            hint="the store's own variables, such as AWS_PROFILE, hold credentials",
        )
    return f"{scheme}://{place}"
