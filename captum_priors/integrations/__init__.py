"""Priors inside distributed training and training frameworks.

What a framework needs lives in a module of its own name, which is imported with the framework and
never without it.
"""
