"""The code and the files of the datasets. This file makes Python import this folder as `data`."""
