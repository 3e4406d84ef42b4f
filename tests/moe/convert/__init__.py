"""Tests of moe/convert/."""
