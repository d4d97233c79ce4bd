"""Training: the paper's stages over a differentiable twin of the model.

`settings` reads the YAML file, `network` is the twin, `focus` a regulariser, `data` makes windows
of text, `trainer` runs the stages, `state` keeps and resumes them, `export` writes the published
format.
"""
