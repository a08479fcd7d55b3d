"""The main job: train small networks with and without a pixel prior, and compare them."""
