"""Run folders made readable: plain data, figures, one page, comparisons."""
