"""``helmholtz explore``: a page that shows what trained models do. Gradio is imported by ``app`` and ``tabs`` alone."""
