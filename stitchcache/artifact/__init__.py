"""Artifacts and their bytes: the entry format, its readers and writers. No torch but in ``consts``."""
