"""Tests of moe/eval/."""
