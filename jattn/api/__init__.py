"""The public functions, one module for each question.

`attention`     what do the queries read?
`weights`       what are the logits and weights themselves?
`views`         how much does each key receive, and how sure is each query?
`strongest`     which keys count most for each query?
`explanation`   what would a call do, as a table?
`explain`       how is that found?
"""
