"""Tests of moe/data/."""
