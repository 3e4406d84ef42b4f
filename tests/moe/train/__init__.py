"""Tests of moe/train/."""
