"""Other self-supervised objectives on the encoder, data and budget of S2DC: python -m lab.rivals configs/x.py"""
