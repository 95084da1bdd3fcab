"""Image classifiers of known history: tiny ViTs and ResNets, what they were taught, and what was done to them.

`world` splits a set of images into what is to be forgotten, what was never taught, and what is kept; `train` teaches
a classifier and writes it as an ordinary Hugging Face folder; `methods` holds the unlearning methods, `controls` what
is no unlearning; `histories` names what may be done, and `build` does it.

    from audit.organisms.imaging.build import ImageRecipe, build

    folder = build(ImageRecipe("vit", "head-only", seed=0), Path("organisms"))
"""
