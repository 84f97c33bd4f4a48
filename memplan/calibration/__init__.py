"""Predicted against measured: how wrong is memplan, and what does a card teach it?"""
