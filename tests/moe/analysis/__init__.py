"""Tests of moe/analysis/."""
