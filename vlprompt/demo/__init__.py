"""A page in the browser to try what was learned: ``vlprompt demo``. It needs the extra ``demo`` (Gradio)."""
