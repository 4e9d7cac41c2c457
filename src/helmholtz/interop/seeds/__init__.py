"""The systems of the library in the spelling of their original READMEs; the folder ``compat`` re-exports them."""
