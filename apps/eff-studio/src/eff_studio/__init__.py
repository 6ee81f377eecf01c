"""Control of diffusion transformers: a command line, a server and a web page."""
