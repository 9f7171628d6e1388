"""What a run is to do: the recipe, its stages and arms, their fingerprints, and what a recipe of somebody else may say.

Imports `errors` and `system`.
"""
