"""Tests of moe/."""
