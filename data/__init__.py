"""Data sets as tokens: preparing, reading, downloading. Each data set is a folder in here."""
import os

DATA = os.path.dirname(os.path.abspath(__file__))
