"""The gate against regressions: is one revision slower than another?"""
