"""Published vision-language models as tables of parts."""
