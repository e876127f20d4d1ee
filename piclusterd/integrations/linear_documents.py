"""What is sent to Linear: every GraphQL document this client knows, each valid for the public schema, as a test holds.

Mutations ask for the id of what they changed, so that an answer about something else is noticed.
"""

from __future__ import annotations

ISSUE_CONTEXT = """
query IssueContext($id: String!, $labels: Int!, $team: IssueLabelFilter!, $workspace: IssueLabelFilter!) {
  issue(id: $id) {
    id identifier title description updatedAt priority trashed
    state { type }
    labels(first: $labels) { nodes { id name } }
    project { name }
    creator { id name email }
    team { id key labels(first: $labels, filter: $team) { nodes { id name isGroup } } }
  }
  issueLabels(first: $labels, filter: $workspace) { nodes { id name isGroup } }
}"""
ISSUE_GLANCE = """
query IssueGlance($id: String!, $labels: Int!) {
  issue(id: $id) { id identifier priority trashed labels(first: $labels) { nodes { id name } } }
}"""
ISSUE_UPDATE = """
mutation IssueUpdate($id: String!, $input: IssueUpdateInput!, $labels: Int!) {
  issueUpdate(id: $id, input: $input) {
    success
    issue { id identifier priority labels(first: $labels) { nodes { id name } } }
  }
}"""
COMMENT_CREATE = """
mutation CommentCreate($input: CommentCreateInput!) {
  commentCreate(input: $input) { success comment { id } }
}"""
COMMENT_UPDATE = """
mutation CommentUpdate($id: String!, $input: CommentUpdateInput!) {
  commentUpdate(id: $id, input: $input) { success comment { id } }
}"""
COMMENT_GLANCE = """
query CommentGlance($id: String!) {
  comment(id: $id) { id body issue { id identifier } }
}"""
ISSUES_SINCE = """
query IssuesSince($since: DateTimeOrDuration!, $first: Int!, $after: String, $labels: Int!) {
  issues(filter: { createdAt: { gte: $since } }, orderBy: createdAt, first: $first, after: $after) {
    nodes {
      id identifier title priority trashed
      state { type }
      creator { id }
      team { id key }
      botActor { id }
      labels(first: $labels) { nodes { id name } }
    }
    pageInfo { hasNextPage endCursor }
  }
}"""
DOCUMENTS = (ISSUE_CONTEXT, ISSUE_GLANCE, ISSUE_UPDATE, COMMENT_CREATE, COMMENT_UPDATE, COMMENT_GLANCE, ISSUES_SINCE)
"""Everything this client ever sends; a test validates each against the public schema."""
