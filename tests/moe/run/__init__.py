"""Tests of moe/run/."""
