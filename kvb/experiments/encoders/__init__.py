"""Pretrained encoders whose weights come as packages: images and text to features."""
