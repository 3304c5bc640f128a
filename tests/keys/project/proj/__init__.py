"""A small project of several files, as a user would have it: what the tests of keys edit."""
