"""The arms of an evaluation: their answers, scores, comparisons and the claim.

Imports the packages up to `sampling`.
"""
