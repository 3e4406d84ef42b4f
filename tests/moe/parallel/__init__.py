"""Tests of moe/parallel/."""
