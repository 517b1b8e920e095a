"""Models of other projects, and models for them: diffusers' folders (diffusers.py, diffusers_config.py), and weights
with the names of Ho et al.'s own code (original.py); a model of any kind, and one made to fit other images
(opening.py). names.py knows what each calls a parameter."""
