"""The data room: rows of files and hub data sets, prompts from rows, duplicates and contamination.

``files`` and ``hub`` read; ``rows`` and ``messages`` check; ``dataset`` joins them; ``prompts`` renders and schedules;
``overlap`` compares data sets; ``adapters`` turns published answers into ours. Importing it loads neither torch nor
transformers; ``pyarrow`` and ``datasets`` are imported where they are used.
"""
