"""The worked example: a small convolutional network on MNIST, from the files to the accuracy."""
