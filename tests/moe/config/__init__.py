"""Tests of moe/config/."""
