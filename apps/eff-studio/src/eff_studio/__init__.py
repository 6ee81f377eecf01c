"""Diffusion with layouts, heads, insertion and style: one engine under a command line, a server and a web page."""
