"""The error of a file that is not what it should be."""

from __future__ import annotations


class DictionaryFormatError(ValueError):
    """A dictionary's file is damaged, malicious, incomplete, or says what cannot be expressed."""
