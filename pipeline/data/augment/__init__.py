"""One policy a file. A policy is a frozen `Config` that is called as `config(image, size, rng)`.

It takes uint8 RGB (height, width, 3), the model's image size in pixels and a random generator keyed by the sample,
and returns uint8 RGB. Policies run one after another; the last must leave a square of the model's size.
"""
