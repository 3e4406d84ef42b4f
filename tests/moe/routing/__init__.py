"""Tests of moe/routing/."""
