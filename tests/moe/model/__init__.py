"""Tests of moe/model/."""
