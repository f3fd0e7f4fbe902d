-- Questions people ask their task database, on SQLite. Each stands alone:
--
--     perdure sql --db quickstart.db "SELECT …"
--     sqlite3 -readonly quickstart.db < examples/queries.sql
--
-- `perdure sql` with no query lists all tables and views with their columns; docs/sql.md explains
-- them. Moments are UTC, costs are US dollars, and NULL in either costs or tokens means unknown.

-- How far is each batch, and what has it cost?
SELECT batch, tasks, pending, running, completed, failed, cancelled, cost_usd
FROM batches
ORDER BY submitted_at DESC;

-- What failed lately, and why?
SELECT task_id, platform, error_class, error, ended_at
FROM tasks
WHERE status = 'failed'
ORDER BY ended_at DESC
LIMIT 20;

-- Which errors are the most frequent, over all attempts, also those that a retry got over?
SELECT platform, error_class, count(*) AS attempts
FROM attempts
WHERE error_class IS NOT NULL
GROUP BY platform, error_class
ORDER BY attempts DESC;

-- Which finished answers mention a word?
SELECT task_id, substr(prompt, 1, 60) AS prompt, substr(output, 1, 60) AS output
FROM tasks
WHERE status = 'completed' AND output LIKE '%export%';

-- What has each team used? Labels are JSON.
SELECT json_extract(labels, '$.team') AS team,
       count(*) AS tasks,
       sum(input_tokens) AS input_tokens,
       sum(output_tokens) AS output_tokens,
       sum(cost_usd) AS cost_usd
FROM tasks
GROUP BY team
ORDER BY output_tokens DESC;

-- What was used, day by day? `unpriced_tasks` are in the tokens but not in the dollars.
SELECT day, platform, model, tasks, input_tokens, output_tokens, cost_usd, unpriced_tasks
FROM usage_daily
ORDER BY day DESC, platform, model;

-- How long did tasks wait, and how long did they run? In seconds.
SELECT task_id,
       round((julianday(started_at) - julianday(submitted_at)) * 86400, 3) AS waited,
       round((julianday(ended_at) - julianday(started_at)) * 86400, 3) AS ran
FROM tasks
WHERE ended_at IS NOT NULL
ORDER BY ran DESC
LIMIT 10;

-- What has a task written so far, finished or not?
SELECT task_id, status, text
FROM task_output
WHERE status = 'running';

-- What was kept of the tasks that were cancelled or failed half-way?
SELECT task_id, status, length(partial_output) AS characters, partial_output
FROM tasks
WHERE partial_output <> '';

-- What happened to the task that was submitted last, event by event?
SELECT version, recorded_at, type, data
FROM task_events
WHERE task_id = (SELECT task_id FROM tasks ORDER BY stream_id DESC LIMIT 1)
ORDER BY version;

-- Who is working right now, and on what?
SELECT w.worker_id, w.host, w.pid, w.heartbeat_at, t.task_id
FROM workers AS w
LEFT JOIN tasks AS t ON t.worker = w.worker_id AND t.status = 'running'
ORDER BY w.heartbeat_at DESC;

-- Which tasks were run again, and how did that end?
SELECT old.task_id, old.error_class, new.task_id AS retried_as, new.status
FROM tasks AS new
JOIN tasks AS old ON old.task_id = new.retry_of;
