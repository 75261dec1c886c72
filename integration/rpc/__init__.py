"""RPC without a broker beside RabbitMQ, through oslo.messaging's public interface only.

Nothing here is collected as a test: it needs today's oslo.messaging and rabbitmq-server.
"""
