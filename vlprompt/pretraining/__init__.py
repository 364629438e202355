"""How the embedded models were trained; nothing here is needed to use them."""
