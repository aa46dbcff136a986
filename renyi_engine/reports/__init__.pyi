from . import charts as charts, glossary as glossary, page as page, pictures as pictures
from .charts import lines as lines, scatter as scatter
from .page import (
    Picture as Picture,
    Section as Section,
    Table as Table,
    as_text as as_text,
    page_title as page_title,
    write_page as write_page,
)
from .pictures import (
    ACCENT as ACCENT,
    COLOURS as COLOURS,
    HEAT as HEAT,
    INK as INK,
    MUTED as MUTED,
    PAPER as PAPER,
    SMALL as SMALL,
    Array as Array,
    order_examples as order_examples,
    particle_colours as particle_colours,
)
