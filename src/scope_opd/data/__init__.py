"""The data room: rows from files (``rows``), prompts from rows and the schedule that deals them out (``prompts``).

Importing it loads neither torch nor transformers; ``pyarrow`` is imported where a parquet file is opened.
"""
